#SBATCH --exclusive
export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3 GLOO_SOCKET_IFNAME=hsn0
export NCCL_NET_GDR_LEVEL=3
export CROSSFL_LAUNCHER="srun --kill-on-bad-exit=1 --cpus-per-task=<cpus>"
