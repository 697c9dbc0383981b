#PBS -l place=scatter
export NCCL_SOCKET_IFNAME=hsn0 GLOO_SOCKET_IFNAME=hsn0
export CROSSFL_LAUNCHER="mpiexec -n $((<nodes> * <ranks>)) --ppn <ranks> --depth <cpus> --cpu-bind depth"
