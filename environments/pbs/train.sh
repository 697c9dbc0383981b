export CROSSFL_LAUNCHER="mpiexec -n $((<nodes> * <ranks>))"
