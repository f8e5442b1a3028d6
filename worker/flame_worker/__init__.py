"""The factory daemon: takes calls from the broker and runs them in child processes."""
