"""The `jp-train` command: one file a subcommand, each only reads arguments, calls the room that does the work,
prints."""
