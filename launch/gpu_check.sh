#!/usr/bin/env bash
# What the first ten minutes on a GPU should tell: is it right, and how fast. Installs nothing; on one GPU:
#
#   launch/gpu_check.sh [--out DIR] [--dry-run] [STEP ...]
#
# Steps go on after one that failed, and end after ten minutes. DIR (gpu_check) gets a log of each, the figures as JSON, and
# summary.json. What is left out, for want of a package or of time, is said. Exit status: 0 all passed, 1 a step failed, 2
# there is no GPU, or the usage is wrong.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
out=gpu_check
dry=""
MOST=590 # seconds in all
wanted=()
while (($#)); do
    case $1 in
        --out) out=${2:?--out wants a directory}; shift ;;
        --dry-run) dry=yes ;;
        -*) echo "gpu_check.sh: unknown option $1" >&2; exit 2 ;;
        *) wanted+=("$1") ;;
    esac
    shift
done

# Name, seconds at most, Python module that it needs (- for none), command. The order is that of what to know first.
steps=(
    "versions|30|-|$python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.version.cuda)'; nvidia-smi; true"
    "kernel|90|triton|DIST_EMA_KERNEL=compiled $python -m pytest -q tests/gpu/test_cuda.py -k 'eager_route or rounded'"
    "tests|240|pytest|$python -m pytest -q tests/gpu"
    "device|150|-|$python launch/benchmark.py device --json > $out/device.json"
    "update|120|-|$python launch/benchmark.py update --device cuda --repeats 3 --json > $out/update.json"
    "memcheck|120|-|compute-sanitizer --tool memcheck --error-exitcode 1 $python launch/benchmark.py device --elements 100000 --tensors 9 --parameters 50000 --repeats 1"
    "racecheck|120|-|compute-sanitizer --tool racecheck --error-exitcode 1 $python launch/benchmark.py device --elements 100000 --tensors 9 --parameters 50000 --repeats 1"
)
for engine in ddp fsdp1 fsdp2 hsdp tp zero1 zero2 zero3; do
    needs=-
    [[ $engine == zero* ]] && needs=deepspeed
    steps+=("train-$engine|60|$needs|$python -m torch.distributed.run --standalone --nproc-per-node 1 launch/train.py --config configs/$engine.yaml --steps 20 --out $out/train-$engine")
done

if [[ -n $dry ]]; then
    printf '%s\n' "${steps[@]}"
    exit 0
fi
if ! $python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh: this torch sees no GPU" >&2
    exit 2
fi
mkdir -p "$out"
results=()
failed=0
for step in "${steps[@]}"; do
    IFS='|' read -r name limit needs command <<<"$step"
    [[ ${#wanted[@]} -gt 0 && " ${wanted[*]} " != *" $name "* ]] && continue
    start=$SECONDS
    ((limit > MOST - SECONDS)) && limit=$((MOST - SECONDS))
    if ((limit < 5)); then
        result="left out, no time"
    elif [[ $needs != - ]] && ! $python -c "import $needs" 2>/dev/null; then
        result="left out, no $needs"
    elif [[ $command == compute-sanitizer* ]] && ! command -v compute-sanitizer >/dev/null; then
        result="left out, no compute-sanitizer"
    elif timeout --kill-after=10 "$limit" bash -c "$command" >"$out/$name.log" 2>&1; then
        result=passed
    elif (($? == 124)); then
        result="failed, longer than $limit s"
        failed=1
    else
        result=failed
        failed=1
    fi
    printf '%-12s %4d s  %s\n' "$name" $((SECONDS - start)) "$result"
    [[ $result == failed* ]] && tail -n 5 "$out/$name.log"
    results+=("{\"step\": \"$name\", \"seconds\": $((SECONDS - start)), \"result\": \"$result\"}")
done
(
    IFS=,
    printf '[%s]\n' "${results[*]}" >"$out/summary.json"
)
echo "logs and figures: $out"
exit $failed
