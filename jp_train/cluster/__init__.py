"""The hosts of a hostfile: which slots a run takes, preflight, launch and restarts, and how the processes of a launch
are found and stopped on every host."""
