"""torchvision's published library needs CUDA, and torchvision cannot be imported without the operations that the library declares.

SGLang and transformers import it and call none of them here. Their schemas are declared just before the import, whoever imports it:
`tools/install_sglang_cpu` has every interpreter of its environment import this module as it starts.
"""

import sys
from importlib.abc import MetaPathFinder

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []


class _Declare(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.cuda.is_available():
            return
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)  # the schemas live as long as it does


sys.meta_path.insert(0, _Declare())
