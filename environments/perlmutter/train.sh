#SBATCH --constraint=gpu
#SBATCH --constraint=gpu&<feature>
export NCCL_SOCKET_IFNAME=hsn0 GLOO_SOCKET_IFNAME=hsn0
if ((<nodes> > 1)); then
    # Between nodes through libfabric, by the plugin in the module `nccl`: an error where it is not
    # found, in place of TCP, which is much slower.
    export NCCL_NET="AWS Libfabric" NCCL_NET_GDR_LEVEL=PHB NCCL_CROSS_NIC=1
    export FI_CXI_DISABLE_HOST_REGISTER=1 FI_MR_CACHE_MONITOR=userfaultfd FI_CXI_DEFAULT_CQ_SIZE=131072
fi
export CROSSFL_LAUNCHER="srun --kill-on-bad-exit=1 --cpus-per-task=<cpus>"
