package node

import (
	"sync"
	"testing"

	"cal/nucleus"
)

// Several that delete a pod at once stop it once, and each is told that it is gone.
func TestDeleteAtTheSameTime(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p, other := h.pod(specOf("w", policyOf(ordinary)), nil), h.pod(specOf("v", policyOf(ordinary)), nil)

	// As if both had found it running.
	for range 2 {
		h.node.stopDeciding(p, "somebody", "")
	}
	var deleting sync.WaitGroup
	for range 8 {
		deleting.Go(func() {
			if err := h.node.DeletePod(t.Context(), "somebody", other.record.ID); err != nil && nucleus.AsError(err).Kind != nucleus.KindNotFound {
				t.Errorf("deleting: %v", err)
			}
		})
	}
	deleting.Wait()
	for _, pod := range []*Pod{p, other} {
		stops := 0
		for _, e := range h.entries(nucleus.KindPodStop, "") {
			if e.Pod == pod.record.ID {
				stops++
			}
		}
		if stops != 1 {
			t.Errorf("pod %s: %d pod.stop, want 1", pod.record.ID, stops)
		}
	}
}
