#!/bin/sh
# SFT with and without the recorded data, three seeds, each evaluated on scenes 0 to 199.
#
#   compare.sh POLICY DATA OUT      DATA holds base, rollouts-sft and corrections-sft
#
# What is there is not made again; several of these may run side by side.
set -e
here=$(dirname "$0")
policy=$1 data=$2 out=$3
mkdir -p "$out"
export OMP_NUM_THREADS=1
for seed in 0 1 2; do
    for arm in base rollouts corrections; do
        name=$arm-$seed
        mkdir "$out/$name.claimed" 2>/dev/null || continue
        case $arm in
            base) sets="$data/base" ;;
            rollouts) sets="$data/base $data/rollouts-sft" ;;
            corrections) sets="$data/base $data/rollouts-sft $data/corrections-sft" ;;
        esac
        rlrc sft "$here/sft.yaml" --policy "$policy" --demonstrations $sets --out "$out/$name" \
            --seed $seed --device cpu >"$out/$name.console" 2>&1
        rlrc eval --policy "$out/$name" --env tabletop --episodes 200 --seed 0 --device cpu \
            --workers 1 --log "$out/$name.jsonl" --json >"$out/$name.json" 2>"$out/$name.eval"
    done
done
