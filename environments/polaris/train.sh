#PBS -l place=scatter
export NCCL_SOCKET_IFNAME=hsn0 GLOO_SOCKET_IFNAME=hsn0
if ((<nodes> > 1)); then
    # Between nodes through libfabric, by the site's plugin: an error where it is not found.
    export NCCL_NET="AWS Libfabric" NCCL_NET_GDR_LEVEL=PHB NCCL_CROSS_NIC=1 NCCL_COLLNET_ENABLE=1
    plugins=/soft/libraries/aws-ofi-nccl/v1.9.1-aws/lib:/soft/libraries/hwloc/lib
    export LD_LIBRARY_PATH=$plugins${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export FI_CXI_DISABLE_HOST_REGISTER=1 FI_MR_CACHE_MONITOR=userfaultfd FI_CXI_DEFAULT_CQ_SIZE=131072
fi
export CROSSFL_LAUNCHER="mpiexec -n $((<nodes> * <ranks>)) --ppn <ranks> --depth <cpus> --cpu-bind depth"
