"""One container of a pod on its node: image, creation, run, end, and the words of its status."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any

from tests.cluster import clock, logs, volumes
from tests.cluster.containers import Mount, Order
from tests.cluster.environment import ConfigFault, expand, variables
from tests.cluster.images import PullFails, full_name, is_name
from tests.cluster.loop import Timer
from tests.cluster.refusals import Json

if TYPE_CHECKING:
    from tests.cluster.pod_run import PodRun

_NEVER = "1970-01-01T00:00:00Z"
_LEAST_GRACE = 2.0
_SAID = 4096


class ContainerRun:
    """A container and its attempts. All methods run on the loop's thread; the pod is told of every change.

    `phase` is what it does: idle, pulling, waiting (for a retry), starting, running, ended.
    """

    def __init__(self, pod: PodRun, spec: Json, *, early: bool) -> None:
        self.pod = pod
        self.spec = spec
        self.name = str(spec["name"])
        self.early = early
        self.sidecar = early and spec.get("restartPolicy") == "Always"
        self.phase = "idle"
        self.code: int | None = None
        self.restarts = 0
        self.was_started = False
        """Whether it ran at least once."""
        self.killed_for_memory = False
        self.said_code: int | None = None
        """What it is said to have ended with, whatever it was."""
        self.state: Json = {"waiting": {"reason": "ContainerCreating"}}
        self.last_state: Json = {}
        self.stopping = False
        self._id = ""
        self._timers: list[Timer] = []
        self._failures = 0

    @property
    def path(self) -> str:
        return f"spec.{'initContainers' if self.early else 'containers'}{{{self.name}}}"

    @property
    def attempt(self) -> str:
        """The name of this attempt for the runtime."""
        return f"{self.pod.uid}/{self.name}/{self.restarts}"

    def _event(self, kind: str, reason: str, message: str) -> None:
        self.pod.event(kind, reason, message, path=self.path)

    def _later(self, delay: float, step: Any) -> None:
        self._timers.append(self.pod.kubelet.loop.later(delay, step))

    def _wait(self, reason: str, message: str, retry: float) -> None:
        """Stand still for *retry* seconds, then begin anew."""
        self.phase = "waiting"
        self.state = {"waiting": {"reason": reason, "message": message}}
        self._later(retry, self._retry)
        self.pod.advance()

    def _retry(self) -> None:
        if self.phase == "waiting" and not self.stopping:
            self.phase = "idle"
            self.pod.advance()

    # To the start

    def begin(self) -> None:
        """Make it run: images first, then everything else."""
        self.phase = "pulling"
        wanted = [*volumes.image_names(self.spec, self.pod.spec), (self.spec["image"], self.spec["imagePullPolicy"])]
        self._next_image(wanted)

    def _next_image(self, wanted: list[tuple[str, str]]) -> None:
        if self.stopping:
            return
        if not wanted:
            self._create()
            return
        (name, policy), images, times = wanted[0], self.pod.kubelet.images, self.pod.kubelet.times
        if not is_name(name):
            fault = f'couldn\'t parse image name "{name}": invalid reference format'
            said = f'Failed to apply default image tag "{name}": {fault}'
            self._event("Warning", "InspectFailed", said)
            self._event("Warning", "Failed", "Error: InvalidImageName")
            self._wait("InvalidImageName", said, times.retry)
        elif policy == "Never" and images.local(name) is None:
            said = f'Container image "{name}" is not present with pull policy of Never'
            self._event("Warning", "ErrImageNeverPull", said)
            self._event("Warning", "Failed", "Error: ErrImageNeverPull")
            self._wait("ErrImageNeverPull", said, times.retry)
        elif policy == "Never" or (policy == "IfNotPresent" and images.local(name) is not None):
            self._event("Normal", "Pulled", f'Container image "{name}" already present on machine')
            self._next_image(wanted[1:])
        else:
            self._event("Normal", "Pulling", f'Pulling image "{name}"')
            self._later(images.delay(name), lambda: self._pull(wanted))
            self.pod.advance()

    def _pull(self, wanted: list[tuple[str, str]]) -> None:
        if self.stopping:
            return
        name, times = wanted[0][0], self.pod.kubelet.times
        try:
            self.pod.kubelet.images.pull(name)
        except PullFails as fault:
            self._event("Warning", "Failed", f'Failed to pull image "{name}": {fault}')
            self._event("Warning", "Failed", "Error: ErrImagePull")
            self.phase = "waiting"
            why = str(fault)
            self.state = {"waiting": {"reason": "ErrImagePull", "message": why}}
            self._later(times.sync, lambda: self._back_off(name, why))
            self.pod.advance()
            return
        self._event(
            "Normal",
            "Pulled",
            f'Successfully pulled image "{name}" in 5ms (5ms including waiting). Image size: 2158112 bytes.',
        )
        self._next_image(wanted[1:])

    def _back_off(self, name: str, fault: str) -> None:
        if self.stopping:
            return
        times = self.pod.kubelet.times
        self._event("Normal", "BackOff", f'Back-off pulling image "{name}"')
        self._event("Warning", "Failed", "Error: ImagePullBackOff")
        detail = f": ErrImagePull: {fault}" if self.pod.kubelet.newer_than(1, 31) else ""
        delay = min(times.back_off * 2**self._failures, times.longest_back_off)
        self._failures += 1
        self._wait("ImagePullBackOff", f'Back-off pulling image "{name}"{detail}', delay)

    def _create(self) -> None:
        kubelet = self.pod.kubelet
        try:
            order = self._order()
        except ConfigFault as fault:
            self._event("Warning", "Failed", f"Error: {fault}")
            self._wait("CreateContainerConfigError", str(fault), kubelet.times.retry)
            return
        if why := kubelet.images.create_faults.get(full_name(self.spec["image"])):
            self._event("Warning", "Failed", f"Error: {why}")
            self._wait("CreateContainerError", why, kubelet.times.retry)
            return
        self.phase = "starting"
        self._id = kubelet.new_id()
        self._event("Normal", "Created", f"Created container{':' if kubelet.newer_than(1, 32) else ''} {self.name}")
        kubelet.containers.start(self.attempt, order, self._told)

    def environment(self) -> dict[str, str]:
        """Raises ConfigFault."""
        kubelet, pod = self.pod.kubelet, self.pod
        return variables(self.spec, pod.now, pod.find, kubelet.services)

    def _order(self) -> Order:
        kubelet, pod = self.pod.kubelet, self.pod
        image = kubelet.images.local(self.spec["image"])
        assert image is not None
        env = self.environment()
        command = [expand(word, env) for word in self.spec.get("command") or ()]
        args = [expand(word, env) for word in self.spec.get("args") or ()]
        argv = [*(command or image.entrypoint), *(args or ([] if command else image.cmd))]
        log = logs.path_of(kubelet.place, pod.uid, self.name, self.restarts)
        log.parent.mkdir(parents=True, exist_ok=True)
        said = log.with_suffix(".said")
        said.touch()
        said.chmod(0o666)
        mounts = [*volumes.mounts(self.spec, pod.spec, pod.directories, kubelet.images)]
        mounts.append(Mount(said, self.spec["terminationMessagePath"]))
        user = self._user(image.user)
        cwd = self.spec.get("workingDir") or image.cwd
        everything = {**image.env, "HOSTNAME": pod.name, **({} if user[0] else {"HOME": "/root"}), **env}
        return Order(argv, everything, cwd, image.root, mounts, pod.name[:63], user, log)

    def _user(self, of_image: tuple[int, int]) -> tuple[int, int]:
        wanted = {**(self.pod.spec.get("securityContext") or {}), **(self.spec.get("securityContext") or {})}
        user = int(wanted.get("runAsUser", of_image[0]))
        if wanted.get("runAsNonRoot") and user == 0:
            place = f'pod: "{self.pod.name}_{self.pod.namespace}({self.pod.uid})", container: {self.name}'
            raise ConfigFault(f"container has runAsNonRoot and image will run as root ({place})")
        return user, int(wanted.get("runAsGroup", of_image[1] if "runAsUser" not in wanted else 0))

    def _told(self, said: str, value: Any) -> None:
        if said == "started":
            self.phase = "running"
            self.was_started = True
            self.state = {"running": {"startedAt": clock.now()}}
            self._event("Normal", "Started", f"Started container {self.name}")
        elif said == "failed":
            begin = "failed to create containerd task: failed to create shim task: OCI runtime create failed"
            text = f"{begin}: runc create failed: unable to start container process: {value}: unknown"
            self._event("Warning", "Failed", f"Error: {text}")
            self._end({"exitCode": 128, "reason": "StartError", "message": text, "startedAt": _NEVER})
        else:
            value = value if self.said_code is None else self.said_code
            reason = "OOMKilled" if self.killed_for_memory else "Completed" if value == 0 else "Error"
            started = self.state.get("running", {}).get("startedAt") or clock.now()
            self._end({"exitCode": value, "reason": reason, "startedAt": started, **self._last_words(value)})
        self.pod.advance()

    def _last_words(self, code: int) -> Json:
        """What the container left as its message."""
        log = logs.path_of(self.pod.kubelet.place, self.pod.uid, self.name, self.restarts)
        said = log.with_suffix(".said")
        text = said.read_text(errors="replace")[-_SAID:] if said.exists() else ""
        if not text and code and self.spec["terminationMessagePolicy"] == "FallbackToLogsOnError":
            text = logs.chosen(logs.rows(log), {"tailLines": "80"}).decode(errors="replace")[-2048:]
        return {"message": text} if text else {}

    def _end(self, terminated: Json) -> None:
        self.phase = "ended"
        self.code = int(terminated["exitCode"])
        self.state = {
            "terminated": {**terminated, "finishedAt": clock.now(), "containerID": f"containerd://{self._id}"}
        }
        self._cancel()

    def _cancel(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    # Again, and to the end

    def again(self) -> None:
        """Start a container that ended once more, after a pause."""
        times = self.pod.kubelet.times
        self.last_state, delay = self.state, min(times.back_off * 2**self.restarts, times.longest_back_off)
        self.restarts += 1
        self.code = None
        place = f"{self.name} in pod {self.pod.name}_{self.pod.namespace}({self.pod.uid})"
        self._event("Warning", "BackOff", f"Back-off restarting failed container {place}")
        self._wait("CrashLoopBackOff", f"back-off {delay:g}s restarting failed container={place}", delay)

    def stop(self, grace: float) -> None:
        """preStop, TERM, KILL after *grace* seconds; what does not run yet never will."""
        if self.phase == "ended":
            return
        begun, self.stopping = self.stopping, True
        if self.phase not in ("starting", "running"):
            self._cancel()
            self.phase = "ended"
            return
        if begun:
            self._later(grace, self.kill)
            return
        if not self.killed_for_memory:
            self._event("Normal", "Killing", f"Stopping container {self.name}")
        hook = ((self.spec.get("lifecycle") or {}).get("preStop") or {}).get("exec")
        if grace <= 0:
            self.kill()
        elif hook and self.phase == "running":
            self._run_hook(hook["command"], grace)
        else:
            self._terminate(grace)

    def _run_hook(self, command: list[str], grace: float) -> None:
        begun = time.monotonic()
        done = False

        def over() -> None:
            nonlocal done
            if not done:
                done = True
                self._terminate(max(grace - (time.monotonic() - begun), _LEAST_GRACE))

        def told(said: str, value: Any) -> None:
            if said == "started":
                return
            if said == "failed" or value:
                why = f"command {' '.join(command)!r} exited with {value}"
                self._event("Warning", "FailedPreStopHook", f"PreStopHook failed: {why}")
            over()

        image = self.pod.kubelet.images.local(self.spec["image"])
        env = {**(image.env if image else {}), "HOSTNAME": self.pod.name, **self.environment()}
        cwd = self.spec.get("workingDir") or (image.cwd if image else "/")
        order = Order(command, env, cwd, user=self._user(image.user if image else (0, 0)), within=self.attempt)
        self.pod.kubelet.containers.start(f"{self.attempt}/preStop", order, told)
        self._later(grace, over)

    def _terminate(self, grace: float) -> None:
        if self.phase == "ended":
            return
        self.pod.kubelet.containers.signal(self.attempt, signal.SIGTERM)
        self._later(grace, self.kill)

    def kill(self) -> None:
        self.pod.kubelet.containers.signal(self.attempt, signal.SIGKILL)

    def out_of_memory(self) -> None:
        """Kill it as the kernel does when its memory is used up."""
        self.killed_for_memory = True
        self.kill()

    def status(self) -> Json:
        """Its row in the pod's status."""
        row: Json = {"name": self.name, "image": full_name(self.spec["image"]), "imageID": ""}
        if self._id:
            row["containerID"] = f"containerd://{self._id}"
            row["imageID"] = f"{row['image']}@sha256:{'0' * 64}"
        running = "running" in self.state
        ready = self.code == 0 if self.early and not self.sidecar else running
        state = self.state
        if self.phase in ("idle", "pulling", "ended") and "waiting" in state and self.pod.blocks(self):
            state = {"waiting": {"reason": "PodInitializing"}}
        row |= {
            "ready": ready,
            "restartCount": self.restarts,
            "started": running,
            "state": state,
            "lastState": self.last_state,
        }
        return row
