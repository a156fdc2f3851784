#!/bin/sh
# From record.py's bags to two sets for SFT: the policy's first 50 successes, and every takeover.
#
#   export.sh POLICY RECORDED DATA
set -e
policy=$1 recorded=$2 data=$3
first=$(grep '"success": true' "$recorded/scenes.jsonl" | head -n 50 |
    sed -E "s|.*\"scene\": ([0-9]+).*|$recorded/bags/scene-\1|")
rlrc bag export $first --contract "$policy" --profile sim --policy policy --out "$data/rollouts-sft"
rlrc bag export "$recorded/bags" --contract "$policy" --profile sim --policy operator \
    --out "$data/corrections-sft"
