"""The hosts of a hostfile: which slots a run takes, how a host is asked something, how the processes of a launch are
found and stopped."""
