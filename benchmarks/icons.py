import argparse, time
from pathlib import Path
import icon_sets
import icon_data
if __name__=="__main__":
    import sys,shutil
    C,N,V,S,J=map(int,sys.argv[1:6]); out=Path(sys.argv[6]); shutil.rmtree(out,ignore_errors=True)
    t=time.time(); n=0
    r=icon_data.draw(Path(".icons/icons.npz"),Path("/work/shared/data/lvis_v1_categories.csv"),icon_data.Settings(classes=C,train_images=N,val_images=V,size=S,seed=0),out,jobs=J,image_done=lambda:None)
    print("\n".join(r)); t=time.time()-t; print(t,(N+2*V)/t/J)
