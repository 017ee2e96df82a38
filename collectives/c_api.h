/* The collectives for C (C99) and whatever can call it. The meaning of every operation is that of communicator.h and
 * membership/membership.h, that of shoal_sync_state in membership/state_sync.h; here is only what differs.
 *
 * Calls return a code, 0 on success; shoal_error() then has the message. Nothing throws, nothing exits. Thread-safe,
 * but for two calls on one handle of which one frees it. Structures with options begin with their size, set by their
 * _init function, so that programs built against an older header go on working with a newer library.
 *
 *   shoal_world_options options;
 *   shoal_world_options_init(&options);
 *   options.rank = 0; options.size = 2; options.master_host = "unix:example";
 *   shoal_group *group;
 *   if (shoal_connect(&options, &group) != SHOAL_OK) { puts(shoal_error()); return 1; }
 *   shoal_work *work = shoal_all_reduce(group, x, x, n, SHOAL_F32, SHOAL_SUM, NULL);
 *   if (shoal_await(work, SHOAL_FOREVER) != SHOAL_OK) ...
 *   shoal_group_free(group);
 */
#ifndef SHOAL_COLLECTIVES_C_API_H_
#define SHOAL_COLLECTIVES_C_API_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by one when something is added; what is there keeps its meaning. */
#define SHOAL_API_VERSION 2
/* That of the library which was linked. */
int32_t shoal_api_version(void);

/* The codes of absl::Status, as they occur here. */
typedef enum shoal_code {
  SHOAL_OK = 0,
  SHOAL_CANCELLED = 1,
  SHOAL_INVALID_ARGUMENT = 3,
  SHOAL_DEADLINE_EXCEEDED = 4,
  SHOAL_PERMISSION_DENIED = 7,
  SHOAL_RESOURCE_EXHAUSTED = 8,
  SHOAL_FAILED_PRECONDITION = 9,
  SHOAL_ABORTED = 10, /* The group is over: form the next epoch. */
  SHOAL_UNIMPLEMENTED = 12,
  SHOAL_INTERNAL = 13,
  SHOAL_UNAVAILABLE = 14,
  SHOAL_DATA_LOSS = 15
} shoal_code;

/* Of the last call on this thread that failed; until the next one. Never NULL. */
const char *shoal_error(void);

/* Integers, because callers may pass values that this library does not know: these are refused. */
typedef int32_t shoal_dtype, shoal_op, shoal_wire, shoal_order;

enum {
  SHOAL_F32 = 0,
  SHOAL_BF16 = 1,
  SHOAL_F16 = 2,
  SHOAL_F64 = 3,
  SHOAL_I8 = 4,
  SHOAL_U8 = 5,
  SHOAL_I32 = 6,
  SHOAL_I64 = 7
};
enum { SHOAL_SUM = 0, SHOAL_PRODUCT = 1, SHOAL_MIN = 2, SHOAL_MAX = 3, SHOAL_AVERAGE = 4 };            /* shoal_op */
enum { SHOAL_AS_IS = 0, SHOAL_WIRE_BF16 = 1, SHOAL_WIRE_INT8 = 2, SHOAL_WIRE_FP8 = 3 };            /* shoal_wire */
enum { SHOAL_FAST = 0, SHOAL_FIXED = 1 };                                                         /* shoal_order */

typedef struct shoal_group shoal_group;
typedef struct shoal_work shoal_work;
typedef struct shoal_memory shoal_memory;
typedef struct shoal_member shoal_member;
typedef struct shoal_coordinator shoal_coordinator;

#define SHOAL_FOREVER (-1.0) /* As a number of seconds. */

/* ---- Connecting. Strings are copied; NULL means the default. Times are in seconds. */

typedef struct shoal_world_options {
  size_t struct_size;
  int32_t rank, size;
  const char *master_host; /* Host name, address, or unix:NAME. */
  int32_t master_port;
  const char *job_id, *secret, *transport, *interface_name;
  int32_t flows;
  double connect_timeout, timeout, heartbeat_timeout;
} shoal_world_options;

void shoal_world_options_init(shoal_world_options *options);
/* Blocks, at most connect_timeout. */
shoal_code shoal_connect(const shoal_world_options *options, shoal_group **group);

typedef struct shoal_member_options {
  size_t struct_size;
  /* Separated by commas: HOST:PORT, unix:NAME, etcd:HOST:PORT. NULL: what an elastic launcher told this process in
   * SHOAL_COORDINATOR, and where job_id and secret are NULL, too, in SHOAL_RUN_ID and SHOAL_JOB_SECRET. */
  const char *coordinators;
  int32_t wanted_rank;      /* -1: any. */
  const char *job_id, *secret, *transport, *interface_name;
  int32_t flows;
  double coordinator_timeout, heartbeat_interval, timeout, heartbeat_timeout;
} shoal_member_options;

void shoal_member_options_init(shoal_member_options *options);
shoal_code shoal_join(const shoal_member_options *options, shoal_member **member);
/* Blocks until the next epoch has formed. The group is the caller's to free, before or after the next epoch. */
shoal_code shoal_next_epoch(shoal_member *member, double timeout, shoal_group **group);
int32_t shoal_joiners_waiting(const shoal_member *member);
void shoal_leave(shoal_member *member); /* Frees it. NULL is nothing. */

typedef struct shoal_coordinator_options {
  size_t struct_size;
  const char *listen; /* HOST:PORT (port 0: any) or unix:NAME. */
  const char *job_id, *secret;
  int32_t size_min, size_max;
  double heartbeat_timeout;
} shoal_coordinator_options;

void shoal_coordinator_options_init(shoal_coordinator_options *options);
shoal_code shoal_coordinator_start(const shoal_coordinator_options *options, shoal_coordinator **coordinator);
const char *shoal_coordinator_address(const shoal_coordinator *coordinator); /* Lives as long as it. */
void shoal_coordinator_stop(shoal_coordinator *coordinator);                 /* Frees it. NULL is nothing. */

/* ---- Groups. */

int32_t shoal_group_index(const shoal_group *group);
int32_t shoal_group_size(const shoal_group *group);
uint64_t shoal_group_epoch(const shoal_group *group);
/* SHOAL_OK while the group lives, otherwise SHOAL_ABORTED; shoal_error() has the cause. */
shoal_code shoal_group_status(const shoal_group *group);
/* `members`: ascending indices of this group, this process among them. Collective over them. */
shoal_code shoal_split(shoal_group *group, const int32_t *members, int32_t count, shoal_group **part);
void shoal_abort(shoal_group *group, const char *cause);
void shoal_group_free(shoal_group *group); /* Waits until no buffer is in use. NULL is nothing. */

/* Zeroed memory that peers on this host read in place. It may outlive the group. */
shoal_code shoal_allocate(shoal_group *group, size_t bytes, shoal_memory **memory);
void *shoal_memory_data(const shoal_memory *memory);
void shoal_memory_free(shoal_memory *memory);

/* ---- Operations. Buffers are borrowed until the work has ended. Each returns a handle, never NULL, also for bad
 * arguments: the error is the work's. */

typedef struct shoal_op_options {
  size_t struct_size;
  double timeout; /* SHOAL_FOREVER: the group's own. */
  const char *label;
  shoal_wire wire;
  shoal_order order;
  const char *algorithm;
} shoal_op_options;

void shoal_op_options_init(shoal_op_options *options);

/* Waits and frees the handle, unless SHOAL_DEADLINE_EXCEEDED: `seconds` passed first, the operation goes on, the
 * handle stays. */
shoal_code shoal_await(shoal_work *work, double seconds);
int shoal_done(const shoal_work *work);  /* 1: Await would not block. */
void shoal_work_drop(shoal_work *work);  /* Frees the handle; the operation goes on, and so does its use of buffers. */

/* Options may be NULL. Counts are in elements; arrays of counts have one entry per rank. */
shoal_work *shoal_all_reduce(shoal_group *group, const void *in, void *out, int64_t count, shoal_dtype dtype, shoal_op op,
                             const shoal_op_options *options);
shoal_work *shoal_reduce_scatter(shoal_group *group, const void *in, const int64_t *counts, void *out, shoal_dtype dtype,
                                 shoal_op op, const shoal_op_options *options);
shoal_work *shoal_all_gather(shoal_group *group, const void *in, const int64_t *counts, void *out, shoal_dtype dtype,
                             const shoal_op_options *options);
/* Equal parts of `count` elements to and from every rank. */
shoal_work *shoal_all_to_all(shoal_group *group, const void *in, void *out, int64_t count, shoal_dtype dtype,
                             const shoal_op_options *options);
shoal_work *shoal_all_to_allv(shoal_group *group, const void *in, const int64_t *send_counts, void *out,
                              const int64_t *recv_counts, shoal_dtype dtype, const shoal_op_options *options);
shoal_work *shoal_broadcast(shoal_group *group, void *in_out, int64_t count, shoal_dtype dtype, int32_t root,
                            const shoal_op_options *options);
shoal_work *shoal_reduce(shoal_group *group, const void *in, void *out, int64_t count, shoal_dtype dtype, int32_t root,
                         shoal_op op, const shoal_op_options *options);
shoal_work *shoal_gather(shoal_group *group, const void *in, const int64_t *counts, void *out, shoal_dtype dtype,
                         int32_t root, const shoal_op_options *options);
shoal_work *shoal_scatter(shoal_group *group, const void *in, const int64_t *counts, void *out, shoal_dtype dtype,
                          int32_t root, const shoal_op_options *options);
shoal_work *shoal_barrier(shoal_group *group, const shoal_op_options *options);
shoal_work *shoal_send(shoal_group *group, const void *in, int64_t count, shoal_dtype dtype, int32_t to, uint32_t tag,
                       const shoal_op_options *options);
shoal_work *shoal_receive(shoal_group *group, void *out, int64_t count, shoal_dtype dtype, int32_t from, uint32_t tag,
                          const shoal_op_options *options);

/* One chunk of a sparse operation: which rank owns it and which hold a copy (ascending, without the owner). */
typedef struct shoal_sparse_move {
  int32_t chunk, owner;
  const int32_t *holders;
  int32_t holders_count;
} shoal_sparse_move;

/* chunks[c] has counts[c] elements, or is NULL where this rank neither owns nor holds chunk c. */
shoal_work *shoal_sparse_all_gather(shoal_group *group, void *const *chunks, const int64_t *counts, int32_t chunks_count,
                                    shoal_dtype dtype, const shoal_sparse_move *moves, int32_t moves_count,
                                    const shoal_op_options *options);
shoal_work *shoal_sparse_reduce_scatter(shoal_group *group, void *const *chunks, const int64_t *counts,
                                        int32_t chunks_count, shoal_dtype dtype, const shoal_sparse_move *moves,
                                        int32_t moves_count, shoal_op op, const shoal_op_options *options);

/* ---- State that all members should hold alike, for example after an epoch with newcomers. */

typedef struct shoal_state {
  const char *name;
  void *data;
  int64_t count;
  shoal_dtype dtype;
} shoal_state;

typedef int32_t shoal_role;
enum {
  SHOAL_EITHER = 0,       /* May win, may be overwritten. */
  SHOAL_RECEIVE_ONLY = 1, /* A newcomer. */
  SHOAL_SEND_ONLY = 2
};

/* Collective; blocks. *revision: of what this rank has, then of what all have. `timeout`: of each operation;
 * SHOAL_FOREVER: the group's own. */
shoal_code shoal_sync_state(shoal_group *group, const shoal_state *states, int32_t states_count, shoal_role role,
                            double timeout, uint64_t *revision);

#ifdef __cplusplus
}
#endif
#endif /* SHOAL_COLLECTIVES_C_API_H_ */
