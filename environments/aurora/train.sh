#PBS -l place=scatter
export GLOO_SOCKET_IFNAME=hsn0
export CROSSFL_LAUNCHER="mpiexec -n $((<nodes> * <ranks>)) --ppn <ranks> --depth <cpus> --cpu-bind depth"
