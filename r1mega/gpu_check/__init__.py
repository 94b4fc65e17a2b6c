"""What only a GPU can prove, measured by one command: `tools/gpu_check`. docs/gpu.md says what each row means.

`checks` asks and compares; each measurement (`measures`) is a process of its own (`worker`), because a platform is chosen once per
process, and because what breaks a GPU's context must not hide what comes after it.
"""
