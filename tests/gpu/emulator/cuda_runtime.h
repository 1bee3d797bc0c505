// In place of CUDA's own, for launchers that run on a CPU.
#include "cuda_on_cpu.h"
