"""Runs of the command line that have things killed, stopped, filled or damaged around them.

`python -m benchmarks faults` repeats each case and prints the table.

`processes`: runs and servers in processes of their own. `cases`: what is done to them. `verdict`: what was lost.
"""
