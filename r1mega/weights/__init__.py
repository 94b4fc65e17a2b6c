"""One description of the weights.

The Hugging Face tensor is the canonical coordinate space. A Megatron rank, a safetensors shard or an engine's copy is a set of
boxes in it: "region `box` of my parameter is region `source` of tensor T". Conversion, weight sync, audit and byte counts
are derived from those boxes; nothing keeps a second description.

- `architecture.Architecture.from_hf(config)`: what a model is, from its `config.json`.
- `canonical.canonical(arch)`: every tensor of its Hugging Face checkpoint (name, shape, how it is stored, what it copies).
- `placement.placement(arch, layout, world_size, rank, spelling)`: every parameter of a Megatron rank and its pieces.
- `pipeline.stages(arch, layout)`: which layers each pipeline stage holds.
- `families/`: one module per family, each with `architecture(config)` and `table(arch)`. A new family is one such module.

A mapping is a box and one operation of a closed list. Identity: a piece. Stack: several pieces of one parameter (gate and up;
q, k and v). Derive: a tensor with `copy_of`, rebuilt on writing and never moved. Quantise: `fp8`, on reading and writing files.
The modules above need neither torch nor Megatron.
"""
