#!/usr/bin/env bash
# V2A-DPO on VGGSound, from a blank machine with GPUs to the report: the commands of the README's section "On MMAudio".
#
#     bash docs/run_vggsound.sh
#
# Download VGGSound and the weights yourself (docs/mmaudio.md, docs/weights.md). If weights are missing, the script
# stops before it computes anything. It stops twice for people: first with pages to rate in 08_rate, then with pages to
# choose in 08_choose. Put what the pages save into the folder ANSWERS and give the same command again, as after any
# interruption. Once stage 05 has begun, no more answers are read.
#
# Give the same variables each time. A weekend on one GPU, a tenth of the paper's clips and steps (docs/mmaudio.md says
# what it costs, what it gives up, and what to add on a card of 24 GB):
#
#     GPUS=1 FLAGS_01="--max-clips 5000" FLAGS_02="--num-rated-clips 150" FLAGS_03="--num-human-pairs 200" \
#         FLAGS_05="--steps 1200 --warmup 100" FLAGS_06="--steps 1200" bash docs/run_vggsound.sh
set -euo pipefail
shopt -s nullglob
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Relative paths are below this repository.
RUN=${RUN:-runs/vgg}
CLIPS=${CLIPS:-vggsound.csv}
VIDEOS=${VIDEOS:-VIDEOS}   # holds <youtube id>_<start second, six digits>.mp4
WEIGHTS=${WEIGHTS:-weights}
MODEL=${MODEL:-mmaudio:large_44k}
ANSWERS=${ANSWERS:-packs}  # holds what people's pages save: rate_*.csv, choose_*.csv
CHOOSE=${CHOOSE:-yes}      # no: do not wait for choices; without any, 05 trains without human pairs
GPUS=${GPUS:-gpu}          # their number, 1, 2, 4 or 8; gpu: as many as there are
PYTHON=${PYTHON:-python3}  # 3.11 or 3.12; for .venv, which is made where packages are missing
export UPSTREAM_DIR=${UPSTREAM_DIR:-$PWD/upstream}
# FLAGS_01 to FLAGS_07: further flags of that stage, but --out

on_gpus() { # 01_generate.py FLAG...
    local more=FLAGS_${1:0:2}
    # shellcheck disable=SC2086 # the flags are several words
    torchrun --standalone --nproc_per_node "$GPUS" "$@" --run-dir "$RUN" --weights "$WEIGHTS" ${!more:-}
}

# Upstream's code, and the packages
for repository in hkchengrex/MMAudio hkchengrex/av-benchmark facebookresearch/ImageBind; do
    clone=$UPSTREAM_DIR/${repository#*/}
    if [ ! -d "$clone" ]; then
        rm -rf "$clone.part" # of a clone that was interrupted
        git clone --depth 1 "https://github.com/$repository" "$clone.part"
        mv "$clone.part" "$clone"
    fi
done
if [ -e .venv/bin/activate ]; then
    source .venv/bin/activate
fi
if ! python -c "import mmaudio, iopath, omegaconf, msgspec, krippendorff, pesq" 2> /dev/null; then
    "$PYTHON" -m venv .venv
    source .venv/bin/activate
    pip install -r requirements.txt
    pip install -c requirements.txt "$UPSTREAM_DIR/MMAudio" timm ftfy regex iopath omegaconf
fi

# The 8 pairs of a step are divided over them.
if [ "$GPUS" = gpu ]; then
    GPUS=$(python -c "import torch; print(torch.cuda.device_count())")
fi
if [[ ! $GPUS =~ ^[1248]$ ]]; then
    more=
    if [ "$GPUS" = 0 ]; then
        more="; PyTorch sees no GPU"
    fi
    echo "GPUS=$GPUS: give 1, 2, 4 or 8$more" >&2
    exit 2
fi

# Candidates
generate=(01_generate.py --model "$MODEL" --clips "$CLIPS" --videos "$VIDEOS")
generate+=(--test-list "$UPSTREAM_DIR/MMAudio/sets/vgg-test.tsv")
# shellcheck disable=SC2086
python "${generate[@]}" --run-dir "$RUN" --weights "$WEIGHTS" ${FLAGS_01:-} --dry-run # stops where weights are missing
on_gpus "${generate[@]}"

# People, and pairs
if [ ! -e "$RUN/05_flow_dpo/settings.json" ]; then
    ratings=("$ANSWERS"/rate_*.csv)
    if ((${#ratings[@]} > 0)); then
        ratings=(--ratings "${ratings[@]}" --redo)
    fi
    on_gpus 02_fit_audioscore.py "${ratings[@]}"
    if [ ! -e "$RUN/02_audioscore.pt" ]; then
        python 08_listen.py rate --run-dir "$RUN"
        echo "Have the pages in $RUN/08_rate answered, put what they save into $ANSWERS/, then give this command again."
        exit
    fi

    choices=("$ANSWERS"/choose_*.csv)
    if ((${#choices[@]} > 0)); then
        choices=(--choices "${choices[@]}")
    fi
    on_gpus 03_mine_pairs.py "${choices[@]}" --redo
    asked=$(tail -n +2 "$RUN/03_to_choose.csv" | wc -l)
    if [ ! -e "$RUN/03_human_choices.jsonl" ] && [ "$CHOOSE" = yes ] && ((asked > 0)); then
        python 08_listen.py choose --run-dir "$RUN"
        echo "Have the pages in $RUN/08_choose answered, put what they save into $ANSWERS/, then give this command" \
            "again; or, to train without human pairs, with CHOOSE=no."
        exit
    fi
    # shellcheck disable=SC2086
    python 04_curriculum_split.py --run-dir "$RUN" --redo ${FLAGS_04:-}
fi

# Training, and the report
on_gpus 05_train_flow_dpo.py
on_gpus 06_ddpo_baseline.py
on_gpus 07_evaluate.py
python 08_listen.py --run-dir "$RUN"
