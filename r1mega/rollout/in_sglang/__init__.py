"""What runs in SGLang's own environment, where the rest of this package is not: files that import nothing of it.

`serve` starts a server. This folder is on its processes' path, so that SGLang finds `r1mega_loader`.
"""
