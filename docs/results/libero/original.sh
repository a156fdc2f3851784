# The original and the recovered policy, each over all 1,000 scenes; what has been made is not made again.
#
#     bash docs/results/libero/original.sh runs/libero
set -eu
out=$1
both=libero_object+libero_spatial
mkdir -p "$out"
rlrc compress libero --skip-evaluation --out "$out" 2>> "$out/compress.log" &
compress=$!
until [ -d "$out/original" ]; do kill -0 $compress; sleep 1; done
rlrc eval --policy "$out/original" --env $both --episodes 1000 --log "$out/original.jsonl" 2> "$out/original.log" &
evaluation=$!
until [ -d "$out/recovered" ]; do kill -0 $compress; sleep 1; done
kill $compress # before PPO
wait $evaluation
rlrc eval --policy "$out/recovered" --env $both --episodes 1000 --log "$out/recovered.jsonl" 2> "$out/recovered.log"
