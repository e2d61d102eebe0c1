"""A Kubernetes cluster for tests, in their own process: an API server, controllers, and nodes that run processes.

The real kubectl talks to it; nothing of ours is replaced. Take the fixtures `cluster` (`own_cluster` for options) and
`kubectl`; `Cluster` in `cluster.py` says what can be asked of it, `cluster.faults` (`weather.py`, `faults.py`) what
can be done to it, `cluster.images` which images there are. `python -m tests.cluster` runs one by hand. It needs root,
Linux, kubectl, unshare and a static busybox; a test that cannot have it says so. With OZ_TEST_KUBECONFIG the fixture
`cluster` is a namespace of that cluster, made for the test and removed behind it; a test that asks it for more is
skipped.

What it is honest about
-----------------------
- Decoding: by the published schemas of the release that is chosen (PyPI `kubernetes-validate`), so that a field which
  that release does not have is refused with its path, as are wrong types, duplicates and bad quantities; warnings and
  silence where `fieldValidation` says so. Then defaults, admission (service account, quotas, webhooks), and the rules
  for names, labels, containers, volumes and Jobs, with causes by field.
- Versions: one counter; a list is one moment, also over its pages; a watch goes on from a version, sends bookmarks
  when allowed, ends by `timeoutSeconds`; the past is bounded, and what is forgotten is 410.
- Deletion: preconditions, grace, finalizers, the three policies (batch/v1 orphans its pods when none is given, with the
  server's warning), garbage collection by ownerReferences, namespaces that end with their content.
- Rights: tokens with rules, 401 and 403 in the server's words, access and rules reviews from the same table. kubectl
  sends tokens over TLS only, so such a cluster is made with `tls`.
- The Job controller: retries, deadlines, time to live, suspension, counts, tracking finalizers, conditions in the
  order of the release (from 1.31 on FailureTarget and SuccessCriteriaMet come first, and the end only when the last
  pod is gone), FailedCreate with the reason.
- The kubelet: number 1 of its own pids, host name, root and mounts; `$(NAME)` and `$$`; env, envFrom, secrets, fields,
  emptyDir, secret, configMap, projected and image volumes; init containers in order and those that stay; pull policies
  and pauses; preStop, TERM, grace, KILL; exit codes; last words; logs with limits; statuses, conditions and events.

What it leaves out
------------------
- Time: pauses that a cluster counts in tens of seconds and minutes are tenths and seconds here (`Times`).
- exec, attach, port-forward, proxy, tables (`kubectl get` prints name and age), server-side apply beyond a strategic
  merge, managedFields, protobuf beyond a few small kinds, watch lists, CRDs, all kinds that `resources.py` leaves out.
- Probes, lifecycle hooks but preStop exec, pod failure and success policies, indexed Jobs, affinity, taints, priority,
  persistent volumes; capabilities, seccomp and limits of resources are accepted and not enforced.
- The network: pods share that of the machine.
"""
