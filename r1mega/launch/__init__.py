"""On a cluster: stages as jobs through NeMo-Run, what became of them, and what a machine has. Nothing else imports `nemo_run`."""
