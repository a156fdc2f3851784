import sys, torch, numpy as np
from pathlib import Path
from training.bundles import load_trainable
from training.data.demonstrations import read
from training.sft import DemonstrationBatches
import torch.nn.functional as F
CPU=torch.device("cpu"); torch.set_num_threads(2)
data=read(Path("/tmp/heldout"))
for name in sys.argv[1:]:
    p=load_trainable(name,CPU); b=DemonstrationBatches(p.processor,p.codec,CPU); b.add(data); torch.manual_seed(5)
    ce=[];acc=[];far=[]
    for _ in range(3):
        x=b.sample(768)
        with torch.no_grad():
            lg,_=p.model.eval()(x.inputs,x.bins)
        lp=lg.float().log_softmax(-1)
        d=torch.arange(lg.shape[-1])-x.bins[...,None]
        t=(-0.5*(d/2.0)**2).softmax(-1)
        ce.append(-(t*lp).sum(-1).mean(0)); acc.append((lg.argmax(-1)==x.bins).float().mean(0))
        far.append(((lg.argmax(-1)-x.bins).abs()>12).float().mean(0))
    print(name); 
    for n,v in (("ce",ce),("acc",acc),("far",far)): print(n, torch.stack(v).mean(0).numpy().round(3))
