/* Two ranks on one host add up a vector: two_ranks RANK NAME, once with rank 0 and once with rank 1. */
#include <collectives/c_api.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: %s RANK NAME\n", argv[0]);
    return 2;
  }
  char master[128];
  snprintf(master, sizeof master, "unix:%s", argv[2]);
  shoal_world_options options;
  shoal_group *group;
  float x[4] = {1, 2, 3, 4};
  shoal_world_options_init(&options);
  options.rank = atoi(argv[1]);
  options.size = 2;
  options.master_host = master;
  if (shoal_connect(&options, &group) != SHOAL_OK) {
    fprintf(stderr, "%s\n", shoal_error());
    return 1;
  }
  if (shoal_await(shoal_all_reduce(group, x, x, 4, SHOAL_F32, SHOAL_SUM, NULL), SHOAL_FOREVER) != SHOAL_OK) {
    fprintf(stderr, "%s\n", shoal_error());
    return 1;
  }
  printf("rank %d: %g %g %g %g\n", shoal_group_index(group), x[0], x[1], x[2], x[3]);
  shoal_group_free(group);
  return x[3] == 8 ? 0 : 1;
}
