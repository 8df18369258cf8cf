package node

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"cal/guest"
	"cal/nucleus"
)

// Who waits for an answer of a machine that dies is told what it died of, and its console's last
// lines: the guest wrote them, so nothing of them may steer a terminal. The pod has failed by
// then.
func TestMachineDiesInRequest(t *testing.T) {
	t.Parallel()
	for name, op := range map[string]nucleus.Op{"brief": nucleus.ReadFiles, "on a stream": nucleus.RunBash} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			p := h.pod(specOf("", policyOf(all)), map[string]string{"a": "text"})
			reached := make(chan struct{})
			h.mu.Lock()
			h.behave = func(m *inside, c *callInside) (guest.CallResult, bool) {
				if c.call.Resolve {
					return c.honest(), true
				}
				for i := range 100 {
					fmt.Fprintf(m.in.Console, "line %d\r\n", i)
				}
				io.WriteString(m.in.Console, "panic: \x1b]0;evil\x07\x1b[2Jall is well\u202e\xff\r\n"+strings.Repeat("x", 5000))
				close(reached)
				<-m.session.Done()
				return guest.CallResult{}, false
			}
			h.mu.Unlock()
			args := map[string]any{"path": "a"}
			if op == nucleus.RunBash {
				args = map[string]any{"argv": []string{"cat", "a"}}
			}
			got := make(chan answer, 1)
			go func() { got <- h.tool(p, op, args) }()
			<-reached
			h.driver.Kill(machineDir(p.dir))
			a := <-got
			if state := p.status().State; state != stateFailed {
				t.Errorf("the pod is %s when its request is answered", state)
			}
			e := a.want(t, nucleus.KindUnavailable)
			for _, text := range []string{p.record.ID, "the machine ended: ", p.machine.Reason(), "console ends with", "\n| line 99\n", `\x1b]0;evil`, "all is well", "hint: cal audit log --pod " + p.record.ID} {
				if !strings.Contains(e.Message, text) {
					t.Errorf("want %q in it: %q", text, e.Message)
				}
			}
			if strings.ContainsAny(e.Message, "\x1b\x07\r\u202e\uFFFD") || strings.Contains(e.Message, "line 50\n") || len(e.Message) > 4000 {
				t.Errorf("%d bytes: %q", len(e.Message), e.Message)
			}
			eventually(t, "it stands in the log", func() bool {
				fails := h.entries(nucleus.KindPodFail, "")
				return len(fails) == 1 && strings.Contains(string(fails[0].Data), "all is well")
			})
		})
	}
}
