#include "collectives/backend/mpi_plugin.h"

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kTextBytes = 1024, kDTypes = 8, kOps = 4, kTextTag = 1 };

struct shoal_mpi_group {
  MPI_Comm comm;   /* Of operations. */
  MPI_Comm voice;  /* Of texts. */
  MPI_Request listening;
  char heard[kTextBytes];
};

struct shoal_mpi_request {
  MPI_Request request;
  int *counts; /* Counts and displacements that MPI may read until the end. */
};

static shoal_mpi_reduce reduce_16;
static MPI_Datatype bf16, f16;
static MPI_Op ops_16[2][kOps];
static int must_finalize;

#define REDUCTION(name, dtype, op)                                                   \
  static void name(void *in, void *in_out, int *count, MPI_Datatype *type) {         \
    (void)type;                                                                      \
    reduce_16(dtype, op, in, in_out, *count);                                        \
  }
REDUCTION(bf16_sum, 1, 0)
REDUCTION(bf16_product, 1, 1)
REDUCTION(bf16_min, 1, 2)
REDUCTION(bf16_max, 1, 3)
REDUCTION(f16_sum, 2, 0)
REDUCTION(f16_product, 2, 1)
REDUCTION(f16_min, 2, 2)
REDUCTION(f16_max, 2, 3)

static MPI_Datatype type_of(int dtype) {
  switch (dtype) {
    case 0: return MPI_FLOAT;
    case 1: return bf16;
    case 2: return f16;
    case 3: return MPI_DOUBLE;
    case 4: return MPI_INT8_T;
    case 5: return MPI_UINT8_T;
    case 6: return MPI_INT32_T;
    default: return MPI_INT64_T;
  }
}

static MPI_Op op_of(int dtype, int op) {
  static const int kSum = 0, kProduct = 1, kMin = 2;
  if (dtype == 1 || dtype == 2) return ops_16[dtype - 1][op];
  return op == kSum ? MPI_SUM : op == kProduct ? MPI_PROD : op == kMin ? MPI_MIN : MPI_MAX;
}

static const char *library(void) {
  static char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(text, &length);
  text[strcspn(text, "\n,")] = '\0';
  return text;
}

static int listen_on(shoal_mpi_group *group) {
  return MPI_Irecv(group->heard, kTextBytes, MPI_CHAR, MPI_ANY_SOURCE, kTextTag, group->voice, &group->listening);
}

static int make_group(MPI_Comm comm, shoal_mpi_group **made) {
  shoal_mpi_group *group = calloc(1, sizeof *group);
  if (group == NULL) return MPI_ERR_NO_MEM;
  group->comm = comm;
  MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  int error = MPI_Comm_dup(comm, &group->voice);
  if (error == 0) error = listen_on(group);
  *made = group;
  return error;
}

static int start(shoal_mpi_reduce reduce, shoal_mpi_group **world) {
  int initialized = 0, provided = 0, error = 0;
  MPI_Initialized(&initialized);
  if (!initialized) {
    error = MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided);
    must_finalize = error == 0;
  } else {
    MPI_Query_thread(&provided);
  }
  if (error != 0) return error;
  if (provided < MPI_THREAD_SERIALIZED) return MPI_ERR_OTHER;
  reduce_16 = reduce;
  MPI_User_function *const functions[2][kOps] = {{bf16_sum, bf16_product, bf16_min, bf16_max},
                                                 {f16_sum, f16_product, f16_min, f16_max}};
  for (int type = 0; type < 2; ++type) {
    MPI_Datatype *const made = type == 0 ? &bf16 : &f16;
    error = MPI_Type_contiguous(2, MPI_BYTE, made);
    if (error == 0) error = MPI_Type_commit(made);
    for (int op = 0; op < kOps && error == 0; ++op) {
      error = MPI_Op_create(functions[type][op], /*commute=*/1, &ops_16[type][op]);
    }
    if (error != 0) return error;
  }
  MPI_Comm comm;
  error = MPI_Comm_dup(MPI_COMM_WORLD, &comm);
  return error != 0 ? error : make_group(comm, world);
}

static int rank_of(const shoal_mpi_group *group) {
  int rank = 0;
  MPI_Comm_rank(group->comm, &rank);
  return rank;
}

static int size_of(const shoal_mpi_group *group) {
  int size = 0;
  MPI_Comm_size(group->comm, &size);
  return size;
}

static int split(shoal_mpi_group *group, const int *members, int count, shoal_mpi_group **part) {
  MPI_Group all, some;
  MPI_Comm comm;
  int error = MPI_Comm_group(group->comm, &all);
  if (error == 0) error = MPI_Group_incl(all, count, members, &some);
  if (error == 0) error = MPI_Comm_create_group(group->comm, some, /*tag=*/members[0], &comm);
  return error != 0 ? error : make_group(comm, part);
}

static void free_group(shoal_mpi_group *group) {
  MPI_Cancel(&group->listening);
  MPI_Request_free(&group->listening);
  MPI_Comm_free(&group->voice);
  MPI_Comm_free(&group->comm);
  free(group);
}

/* Counts as ints, and behind them displacements. */
static int *layout(int *to, const int64_t *counts, int size) {
  int displacement = 0;
  for (int i = 0; i < size; ++i) {
    to[i] = (int)counts[i];
    to[size + i] = displacement;
    displacement += to[i];
  }
  return to;
}

static int begin(shoal_mpi_group *group, const shoal_mpi_op *op, shoal_mpi_request **made) {
  const int size = size_of(group), self = rank_of(group), count = (int)op->count;
  const MPI_Datatype type = type_of(op->dtype);
  shoal_mpi_request *const request = calloc(1, sizeof *request);
  int *const counts = calloc((size_t)size * 4, sizeof *counts);
  if (request == NULL || counts == NULL) {
    free(request);
    free(counts);
    return MPI_ERR_NO_MEM;
  }
  request->counts = counts;
  int *const receives = counts + 2 * size;
  if (op->counts != NULL) layout(counts, op->counts, size);
  if (op->recv_counts != NULL) layout(receives, op->recv_counts, size);
  const int in_place = op->in == op->out;
  MPI_Request *const r = &request->request;
  int element = 0, error = MPI_ERR_OTHER;
  MPI_Type_size(type, &element);
  const char *const in = op->in;
  char *const out = op->out;
  switch (op->kind) {
    case SHOAL_MPI_ALL_REDUCE:
      error = MPI_Iallreduce(in_place ? MPI_IN_PLACE : in, out, count, type, op_of(op->dtype, op->op), group->comm, r);
      break;
    case SHOAL_MPI_REDUCE_SCATTER:
      error = MPI_Ireduce_scatter(in, out, counts, type, op_of(op->dtype, op->op), group->comm, r);
      break;
    case SHOAL_MPI_ALL_GATHER: {
      const int own = in == out + (int64_t)counts[size + self] * element;
      error = MPI_Iallgatherv(own ? MPI_IN_PLACE : in, counts[self], type, out, counts, counts + size, type,
                              group->comm, r);
      break;
    }
    case SHOAL_MPI_ALL_TO_ALL:
      error = MPI_Ialltoallv(in, counts, counts + size, type, out, receives, receives + size, type, group->comm, r);
      break;
    case SHOAL_MPI_BROADCAST:
      error = MPI_Ibcast(out, count, type, op->peer, group->comm, r);
      break;
    case SHOAL_MPI_REDUCE: {
      const void *const from = in_place && self == op->peer ? MPI_IN_PLACE : in;
      error = MPI_Ireduce(from, out, count, type, op_of(op->dtype, op->op), op->peer, group->comm, r);
      break;
    }
    case SHOAL_MPI_GATHER: {
      const int own = self == op->peer && in == out + (int64_t)counts[size + self] * element;
      error = MPI_Igatherv(own ? MPI_IN_PLACE : in, counts[self], type, out, counts, counts + size, type, op->peer,
                           group->comm, r);
      break;
    }
    case SHOAL_MPI_SCATTER: {
      const int own = self == op->peer && out == in + (int64_t)counts[size + self] * element;
      error = MPI_Iscatterv(in, counts, counts + size, type, own ? MPI_IN_PLACE : out, counts[self], type, op->peer,
                            group->comm, r);
      break;
    }
    case SHOAL_MPI_BARRIER:
      error = MPI_Ibarrier(group->comm, r);
      break;
    case SHOAL_MPI_SEND:
      error = MPI_Isend(in, count, type, op->peer, op->tag, group->comm, r);
      break;
    case SHOAL_MPI_RECEIVE:
      error = MPI_Irecv(out, count, type, op->peer, op->tag, group->comm, r);
      break;
  }
  if (error != 0) {
    free(request->counts);
    free(request);
    return error;
  }
  *made = request;
  return 0;
}

static int test(shoal_mpi_request *request, int *done) {
  const int error = MPI_Test(&request->request, done, MPI_STATUS_IGNORE);
  if (error != 0 || *done) {
    free(request->counts);
    free(request);
    *done = 1;
  }
  return error;
}

static int tell(shoal_mpi_group *group, int rank, const char *text) {
  /* Nobody waits for it, so it is never freed; a group says one text to each rank, when it ends. */
  char *const sent = calloc(1, kTextBytes);
  MPI_Request request;
  if (sent == NULL) return MPI_ERR_NO_MEM;
  snprintf(sent, kTextBytes, "%s", text);
  const int error = MPI_Isend(sent, (int)strlen(sent) + 1, MPI_CHAR, rank, kTextTag, group->voice, &request);
  return error != 0 ? error : MPI_Request_free(&request);
}

static int heard(shoal_mpi_group *group, int *from, char *text, int text_bytes) {
  int done = 0;
  MPI_Status status;
  if (MPI_Test(&group->listening, &done, &status) != 0 || !done) return 0;
  *from = status.MPI_SOURCE;
  group->heard[kTextBytes - 1] = '\0';
  snprintf(text, (size_t)text_bytes, "%s", group->heard);
  return listen_on(group) == 0;
}

static void stop(void) {
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (must_finalize && !finalized) MPI_Finalize();
}

static void error_text(int error, char *text, int text_bytes) {
  char full[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(error, full, &length);
  snprintf(text, (size_t)text_bytes, "%s", full);
}

/* The one symbol. */
__attribute__((visibility("default"))) const shoal_mpi_plugin shoal_mpi_plugin_table = {
    SHOAL_MPI_PLUGIN_VERSION, library, start, rank_of, size_of, split, free_group, begin, test, tell, heard, stop,
    error_text};
