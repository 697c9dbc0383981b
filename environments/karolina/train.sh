module purge || exit 1
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export CROSSFL_LAUNCHER="srun --kill-on-bad-exit=1 --cpus-per-task=<cpus>"
