# The original, the recovered policy and PPO's of seed 0, each over all 1,000 scenes; what has been made is not made again. A
# second GPU, where there is one, evaluates the original while the first one trains.
#
#     bash docs/results/libero/run.sh runs/libero
set -eu
out=$1
both=libero_object+libero_spatial
last=$(($(nvidia-smi -L | wc -l) - 1))
made() { until [ -d "$out/$1" ]; do kill -0 $compress; sleep 1; done; }
judge() { rlrc eval --policy "$out/$1" --env $both --episodes 1000 --log "$out/$1.jsonl" 2> "$out/$1.log"; }
mkdir -p "$out"
rlrc compress libero --skip-evaluation --out "$out" 2>> "$out/compress.log" &
compress=$!
made original
CUDA_VISIBLE_DEVICES=$last MUJOCO_EGL_DEVICE_ID=$last judge original &
evaluation=$!
made rl-seed-0
kill $compress # before the other seeds
wait $evaluation
judge rl-seed-0
judge recovered
