"""Video in, uint8 clips out. Importing this needs neither PyAV nor a GPU."""

from .decode import decode_video
from .evaluation_loader import EvaluationLoader, VideoViews
from .lists import ManifestError
from .loader import BadDataError, Batch, Replaced, VideoLoader
from .manifest import Manifest, Record, Source, open_sources, read_datasets
from .planes import decode_yuv420
from .probing import DecodeError, probe
from .schedule import Mixture

__all__ = [
    "BadDataError", "Batch", "DecodeError", "EvaluationLoader", "Manifest", "ManifestError", "Mixture", "Record", "Replaced",
    "Source", "VideoLoader", "VideoViews", "decode_video", "decode_yuv420", "open_sources", "probe",
    "read_datasets",
]  # fmt: skip
