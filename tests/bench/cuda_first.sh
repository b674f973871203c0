#!/bin/sh
# What works on a machine with a GPU: from a bare checkout, without a network, in less than ten minutes.
#
#     sh tests/bench/cuda_first.sh [a folder of wheels that the machine lacks: msgspec, for grammars llguidance]
#
# The tests that need the device, then Llama 3.1 8B's shape: figures of cuda_decode.py, one JSON line each.
set -u
cd "$(dirname "$0")/../.."
site=$(mktemp -d)
if [ $# -gt 0 ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$1"/*.whl || exit
fi
[ -e "$site/llmasos" ] || ln -s "$PWD" "$site/llmasos"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python3 - <<'END' || exit
import sys, torch, transformers, triton
from llmasos.drivers.torch.executor import TorchDriver
from llmasos.drivers.torch.ops import triton_trouble
print(sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__,
      "transformers", transformers.__version__)
print(triton_trouble(torch.device("cuda", 0)) or "Triton compiles and runs here")
print(TorchDriver("cuda").describe())
END
timeout 270 python3 -m pytest -q -W default -p no:cacheprovider --maxfail 40 --durations 8 \
    tests/drivers/test_cuda_path.py tests/drivers/test_adapters.py tests/drivers/test_encoders.py \
    -k "kernel or captured or fewer_bits or float8 or triton or (cuda and not test_cuda_path)"
timeout 290 python3 tests/bench/cuda_decode.py --shapes 8b --batches 1,8,64 --peer-batches 1,64 \
    --profile --seconds 240
