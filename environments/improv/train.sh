#PBS -l place=scatter
export CROSSFL_LAUNCHER="mpiexec -n $((<nodes> * <ranks>)) --map-by ppr:<ranks>:node:PE=<cpus>"
