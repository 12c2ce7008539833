"""How time and memory of each engine grow with the batch, the length of the text and the number of factor sets.

curves.py   the points of each curve
worker.py   a process with one engine, which measures one point at a time
run.py      asks the workers of all engines in turn
report.py   tables and plots
"""
