"""Options in files of their own."""
