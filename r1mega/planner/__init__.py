"""What a model costs on a cluster, as arithmetic; nothing here needs torch.

`flops`, `parameters`, `activations`, `memory`, `schedule`, `communication`, `compute`, `step`, `engine`: formulas. `devices`, `constants`:
numbers. `plan`: a recipe. `search`: layouts. `backtest`: all of it against published figures.
"""
