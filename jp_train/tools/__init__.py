"""What `jp-train data …` does, one module a command; the command line only calls these."""
