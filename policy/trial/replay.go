package trial

import (
	"encoding/json"
	"iter"
	"strings"
	"time"

	"cal/nucleus"
	"cal/policy"
)

// Replayed is one recorded request as another policy decides it.
type Replayed struct {
	Seq      int64           `json:"seq"`
	Op       nucleus.Op      `json:"op"`
	Recorded nucleus.Verdict `json:"recorded"`
	Decision nucleus.Verdict `json:"decision"`
	Rule     string          `json:"rule"`
	Why      string          `json:"why"`
}

// Replay is a log under another policy.
type Replay struct {
	Requests int        `json:"requests"`
	Denied   []Replayed `json:"denied"`
	Asked    []Replayed `json:"asked"`
	// Unjudged are the sequence numbers of requests of which the log does not show
	// enough: cut, redacted, or never resolved.
	Unjudged []int64 `json:"unjudged"`
}

// pod is what the log says of a machine, and what its session would have taken.
type pod struct {
	contained, untrusted bool
	workspace            string
}

// Run judges every request of a log by p, in the order in which they were recorded.
// The exposure is that of a session under p: it begins with what the session had
// when the log saw it first, what p denies does not expose, and an ask counts as
// granted. Sessions of one workspace share it, and so do a pod and those that its agent asked
// for. An error ends it.
func Run(p *policy.Policy, entries iter.Seq2[nucleus.Entry, error]) (Replay, error) {
	r := Replay{Denied: []Replayed{}, Asked: []Replayed{}, Unjudged: []int64{}}
	pods := map[string]*pod{}
	exposures := map[string]nucleus.Legs{}
	for e, err := range entries {
		if err != nil {
			return r, err
		}
		at := pods[e.Pod]
		if at == nil {
			at = &pod{workspace: "pod " + e.Pod}
			pods[e.Pod] = at
		}
		if e.Kind != nucleus.KindIntent {
			at.learn(e, pods, exposures)
			continue
		}
		action, ok := recorded(e)
		if !ok && e.Verdict == nucleus.Deny && strings.HasPrefix(e.Rule, "egress.") {
			continue // the gateway refuses it, whatever the policy: what the model's route does not carry, a host that is none
		}
		r.Requests++
		if !ok {
			r.Unjudged = append(r.Unjudged, e.Seq)
			continue
		}
		d := p.Decide(action, nucleus.Context{
			Exposure: exposures[at.workspace], UntrustedRepo: at.untrusted, Contained: at.contained, UnixMilli: milliseconds(e.Time),
		})
		exposures[at.workspace] = after(exposures[at.workspace], d)
		result := Replayed{e.Seq, e.Op, e.Verdict, d.Verdict, d.Rule, d.Why}
		switch d.Verdict {
		case nucleus.Deny:
			r.Denied = append(r.Denied, result)
		case nucleus.Ask:
			r.Asked = append(r.Asked, result)
		}
	}
	return r, nil
}

// learn takes from an entry what later decisions depend on.
func (at *pod) learn(e nucleus.Entry, pods map[string]*pod, exposures map[string]nucleus.Legs) {
	var data struct {
		Mode      nucleus.Mode `json:"mode"`
		Workspace string       `json:"workspace"`
		Untrusted *bool        `json:"untrusted"`
		Sub       struct {
			Parent string `json:"parent"`
		} `json:"sub"`

		Instructions []string `json:"instructions"`
	}
	if json.Unmarshal(e.Data, &data) != nil {
		return
	}
	switch e.Kind {
	case nucleus.KindPodCreate:
		at.contained = data.Mode == nucleus.Contained
		if data.Workspace != "" {
			at.workspace = "workspace " + data.Workspace
		}
		if above := pods[data.Sub.Parent]; above != nil {
			at.workspace = above.workspace
		}
	case nucleus.KindPodStart, nucleus.KindPodAdopt, nucleus.KindSessionStart, nucleus.KindRepoImport:
		if data.Untrusted != nil {
			at.untrusted = at.untrusted || *data.Untrusted
		}
		// Later entries say what the session took under the policy of its time, except
		// for the instruction files, which no policy judges.
		legs, err := nucleus.LegsOf(e.Exposure)
		if _, seen := exposures[at.workspace]; err == nil && (!seen || len(data.Instructions) > 0) {
			if seen {
				legs &= nucleus.Private | nucleus.Untrusted
			}
			exposures[at.workspace] |= legs
		}
	}
}

// recorded reads the action that an intent shows. It is false where the log shows
// less than a decision needs.
func recorded(e nucleus.Entry) (nucleus.Action, bool) {
	var a nucleus.Action
	if e.Rule == "resolve" || json.Unmarshal(e.Args, &a) != nil || a.Op != e.Op {
		return a, false
	}
	for _, text := range judgedTexts(a) {
		if strings.Contains(text, "[cut: ") || strings.Contains(text, "[redacted]") {
			return a, false
		}
	}
	return a, true
}

// judgedTexts are all texts that a decision reads.
func judgedTexts(a nucleus.Action) []string {
	var texts []string
	files := a.Files
	if c := a.Command; c != nil {
		texts = append(append(texts, c.Argv...), c.Dir)
		files = append(files[:len(files):len(files)], c.Files...)
		for name := range c.Env {
			texts = append(texts, name)
		}
	}
	for _, f := range files {
		texts = append(texts, f.Path)
	}
	if a.Commit != nil {
		texts = append(append(texts, a.Commit.Repo), a.Commit.Paths...)
	}
	if a.Fetch != nil {
		texts = append(texts, a.Fetch.Method, a.Fetch.Host, a.Fetch.Path)
	}
	if a.Connect != nil {
		texts = append(texts, a.Connect.Host)
	}
	if a.Sub != nil {
		texts = append(texts, string(a.Sub.Policy))
	}
	return texts
}

// milliseconds reads the time of an entry.
func milliseconds(text string) int64 {
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return 0
	}
	return t.UnixMilli()
}
