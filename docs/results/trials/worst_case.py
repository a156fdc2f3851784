"""How often Tango's test wrongly shows non-inferiority at worst, whatever share of pairs is unlike.

    python docs/results/trials/worst_case.py > docs/results/trials/worst_case.json

Exact, summed over every outcome: the candidate is worse by exactly the margin, and the share of
pairs in which one arm alone succeeds goes from the margin to 1 on a grid of 40.
"""

import json

import numpy as np

from rlrc_ros.trials.power import power

rows = []
for n in (10, 20, 30, 60, 100, 200):
    for margin in (0.05, 0.1, 0.15, 0.2):
        shares = np.linspace(margin, 1, 40)
        errors = [power(n, margin, 0.05, share, -margin) for share in shares]
        row = {"pairs": n, "margin": margin, "error": round(max(errors), 4)}
        rows.append(row | {"discordance": round(float(shares[np.argmax(errors)]), 3)})
print(json.dumps(rows, indent=1))
