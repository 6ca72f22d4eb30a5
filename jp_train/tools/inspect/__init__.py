"""`jp-train data inspect`: one page that shows packed rows."""
