"""One description of the weights.

The Hugging Face tensor is the canonical coordinate space. A Megatron rank, a safetensors shard or an engine's copy is a set of
boxes in it: "region `box` of my parameter is region `source` of tensor T". Conversion, weight sync, audit and byte counts
are derived from those boxes; nothing keeps a second description.

- `architecture.Architecture.from_hf(config)`: what a model is, from its `config.json`.
- `canonical.canonical(arch)`: every tensor of its Hugging Face checkpoint (name, shape, how it is stored, what it copies).
- `placement.placement(arch, layout, world_size, rank, spelling)`: every parameter of a Megatron rank and its pieces.
- `pipeline.stages(arch, layout)`: which layers each pipeline stage holds.
- `plan.export_plan(arch, layout, world_size, spelling)`: who sends which elements, so that all ranks get the Hugging Face tensors.
- `plan.transfer_plan(holders, holders)`: who sends what to whom to get from one layout to another.
- `sync.full_plan`, `direct.direct_plan`: a trainer's shards to an engine, bucket by bucket, as full tensors or as the engine's own shards.
- `engine.engine_params(arch, engine, rank)`: every parameter of an SGLang rank and its pieces. `wire.Wire`: dtypes that are sent.
- `shipping`: the torch side of both. `links`: bytes per link, their bound, a schedule that comes close to it.
- `moving`: the torch side of the plans within a trainer, and loading a rank's parameters from files.
- `safetensors_in`, `safetensors_out`: read a Hugging Face folder by box, write one in strips. `fp8`: DeepSeek's block quantisation.
- `checkpoint_keys.stored_tensors(arch)`, `dist_checkpoint`: what a Megatron checkpoint holds, and its files by box.
- `convert`: from one of these formats to the other. `ranks.rank_classes`: which ranks of a layout hold the same shapes.
- `audit.figures(config)`, `audit.inspect(folder)`: what a checkpoint must hold, and what is wrong with one.
- `families/`: one module per family, each with `architecture(config)` and `table(arch)`. A new family is one such module.

A mapping is a box and one operation of a closed list. Identity: a piece. Stack: several pieces of one parameter (gate and up;
q, k and v). Derive: a tensor with `copy_of`, rebuilt on writing and never moved. Quantise: `fp8`, on reading and writing files
and on the way to an engine.
Only `moving`, `shipping`, `fp8`, the readers and writers of files, `convert` and `audit` need torch; nothing here needs Megatron.
"""
