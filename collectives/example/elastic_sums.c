/* Ranks that come and go keep summing. Each process runs
 *
 *   elastic_sums COORDINATOR SECONDS          joins the job at COORDINATOR (HOST:PORT or unix:NAME)
 *   elastic_sums SECONDS                      joins the job of the launcher: shoal launch --rdzv-backend shoal ...
 *   elastic_sums --coordinate LISTEN SECONDS  is the coordinator instead
 *
 * Start as many as you like, kill any of them: the others go on, and newcomers are let in every 1000 sums and told how many
 * there have been. */
#include <collectives/c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { kCount = 1 << 16 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int fail(const char *what) {
  fprintf(stderr, "%s: %s\n", what, shoal_error());
  return 1;
}

static int coordinate(const char *listen, double seconds) {
  shoal_coordinator_options options;
  shoal_coordinator *coordinator;
  shoal_coordinator_options_init(&options);
  options.listen = listen;
  if (shoal_coordinator_start(&options, &coordinator) != SHOAL_OK) return fail("coordinator");
  printf("coordinator at %s\n", shoal_coordinator_address(coordinator));
  fflush(stdout);
  sleep((unsigned)seconds);
  shoal_coordinator_stop(coordinator);
  return 0;
}

/* Sums until the group ends (SHOAL_ABORTED), until all want to let newcomers in, or until the time of one is over, so that all
 * stop (both SHOAL_OK). */
static shoal_code sum(shoal_member *member, shoal_group *group, float *x, double end, int64_t *sums, int *stop) {
  for (long i = 1;; ++i) {
    const float ranks = (float)shoal_group_size(group);
    for (int k = 0; k < kCount; ++k) x[k] = 1;
    shoal_code code = shoal_await(shoal_all_reduce(group, x, x, kCount, SHOAL_F32, SHOAL_SUM, NULL), SHOAL_FOREVER);
    if (code != SHOAL_OK) return code;
    if (x[0] != ranks || x[kCount - 1] != ranks) {
      fprintf(stderr, "wrong sum: %g in a group of %g\n", x[0], ranks);
      exit(1);
    }
    ++*sums;
    if (i % 1000 != 0) continue;
    /* What to do next is decided by all together: stop (2), let newcomers in (1), go on (0). */
    int32_t next = now() > end ? 2 : shoal_joiners_waiting(member) > 0 ? 1 : 0;
    code = shoal_await(shoal_all_reduce(group, &next, &next, 1, SHOAL_I32, SHOAL_MAX, NULL), SHOAL_FOREVER);
    *stop = code == SHOAL_OK && next == 2;
    if (code != SHOAL_OK || next > 0) return code;
  }
}

int main(int argc, char **argv) {
  if (argc == 4 && strcmp(argv[1], "--coordinate") == 0) return coordinate(argv[2], atof(argv[3]));
  if (argc != 2 && argc != 3) {
    fprintf(stderr, "usage: %s [COORDINATOR] SECONDS | --coordinate LISTEN SECONDS\n", argv[0]);
    return 2;
  }
  shoal_member_options options;
  shoal_member *member;
  shoal_group *group;
  shoal_memory *memory = NULL;
  int64_t sums = 0;
  int stop = 0;
  const double end = now() + atof(argv[argc - 1]);
  shoal_member_options_init(&options);
  if (argc == 3) options.coordinators = argv[1];
  if (shoal_join(&options, &member) != SHOAL_OK) return fail("join");
  while (!stop) {
    if (shoal_next_epoch(member, 30, &group) != SHOAL_OK) return fail("next epoch");
    /* Who knows of the most is right: the others are newcomers, or missed the end of the last one. */
    const shoal_state state = {"sums", &sums, 1, SHOAL_I64};
    uint64_t revision = (uint64_t)sums;
    shoal_code code = shoal_sync_state(group, &state, 1, SHOAL_EITHER, SHOAL_FOREVER, &revision);
    printf("epoch %llu: rank %d of %d, %lld sums so far\n", (unsigned long long)shoal_group_epoch(group),
           shoal_group_index(group), shoal_group_size(group), (long long)sums);
    fflush(stdout);
    if (code == SHOAL_OK && memory == NULL) code = shoal_allocate(group, kCount * sizeof(float), &memory);
    if (code == SHOAL_OK) code = sum(member, group, shoal_memory_data(memory), end, &sums, &stop);
    if (code == SHOAL_ABORTED) printf("%s\n", shoal_error());
    shoal_group_free(group);
    if (code != SHOAL_OK && code != SHOAL_ABORTED) return fail("epoch");
  }
  printf("%lld sums\n", (long long)sums);
  shoal_memory_free(memory);
  shoal_leave(member);
  return 0;
}
