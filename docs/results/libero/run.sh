# The original and the recovered policy, each over all 1,000 scenes, and PPO of seeds 0 and 2; what has been made is not made
# again. A second GPU, where there is one, evaluates while the first one trains.
#
#     bash docs/results/libero/run.sh runs/libero
set -eu
out=$1
both=libero_object+libero_spatial
last=$(($(nvidia-smi -L | wc -l) - 1))
aside() { CUDA_VISIBLE_DEVICES=$last MUJOCO_EGL_DEVICE_ID=$last "$@"; }
made() { until [ -d "$out/$1" ]; do kill -0 $compress; sleep 1; done; }
judge() { aside rlrc eval --policy "$out/$1" --env $both --episodes 1000 --workers 40 --log "$out/$1.jsonl" 2> "$out/$1.log"; }
mkdir -p "$out"
rlrc compress libero --skip-evaluation --out "$out" 2>> "$out/compress.log" &
compress=$!
made original
judge original &
made recovered
aside rlrc rl libero --policy "$out/recovered" --out "$out/rl-seed-2" --seed 2 --demonstrations \
    "$out/demonstrations" "$out"/work/*/corrections-? 2> "$out/rl-seed-2.log" &
made rl-seed-0
judge recovered
judge rl-seed-0
kill $compress
