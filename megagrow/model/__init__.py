"""Single-device model. Nothing here depends on other ranks."""
