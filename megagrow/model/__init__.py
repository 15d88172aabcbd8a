"""What is trained, as one device sees it. Nothing here knows of other ranks."""
