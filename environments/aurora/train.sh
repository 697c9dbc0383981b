#PBS -l place=scatter
export GLOO_SOCKET_IFNAME=hsn0
# Each tile is a device, of which rank n of a node takes the n-th, and eight cores of that tile's
# socket. The first core of each socket, 0 and 52, is left to the system.
export ZE_FLAT_DEVICE_HIERARCHY=FLAT
unset ZE_AFFINITY_MASK
cores=1-8:9-16:17-24:25-32:33-40:41-48:53-60:61-68:69-76:77-84:85-92:93-100
export CROSSFL_LAUNCHER="mpiexec -n $((<nodes> * <ranks>)) --ppn <ranks> --cpu-bind list:$cores"
