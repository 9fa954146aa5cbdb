// One rank of a job that breaks: comm_mpi_deaths MODE SECONDS, under mpirun --enable-recovery.
#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdlib>

#include "failure/comm_deaths.h"
#include "meshloom/comm/backends.h"

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const auto limit = std::chrono::milliseconds(static_cast<int>(1000 * std::atof(argv[2])));
  auto world = meshloom::comm::make_mpi_world({.timeout = limit});
  return meshloom::comm::deaths::run(world, argv[1]);
}
