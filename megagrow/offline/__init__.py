"""Growth and conversion from file to file, in bounded memory."""
