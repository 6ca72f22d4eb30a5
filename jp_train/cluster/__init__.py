"""A run on the hosts of a hostfile: slots, preflight, launch, restarts, and stopping the processes of a launch."""
