package node

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"

	"cal/egress"
	"cal/internal/durable"
	"cal/nucleus"
)

// rootSession is the exposure that a session and all its sub-agents and sub-pods
// share. Its mutex is the critical section of a request: decide, add legs, append
// the intent.
type rootSession struct {
	mu       sync.Mutex
	file     string
	exposure nucleus.Legs
	evidence []nucleus.Evidence // which entry took each leg
}

type exposureFile struct {
	Legs     []string           `json:"legs"`
	Evidence []nucleus.Evidence `json:"evidence,omitempty"`
}

// openSession reads the exposure that is stored with a workspace: a new session
// starts with it.
func openSession(workspaceDir string) (*rootSession, error) {
	s := &rootSession{file: filepath.Join(workspaceDir, "exposure.json")}
	var stored exposureFile
	err := durable.Load(s.file, &stored)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if s.exposure, err = nucleus.LegsOf(stored.Legs); err != nil {
		return nil, fmt.Errorf("%s: %w", s.file, err)
	}
	s.evidence = stored.Evidence
	return s, nil
}

// grow adds legs durably. The caller holds the mutex and has not acted yet.
func (s *rootSession) grow(takes nucleus.Legs, evidence func(leg string) nucleus.Evidence) error {
	fresh := takes &^ s.exposure
	if fresh == 0 {
		return nil
	}
	grown := append([]nucleus.Evidence(nil), s.evidence...)
	for _, leg := range fresh.Names() {
		grown = append(grown, evidence(leg))
	}
	stored := exposureFile{Legs: (s.exposure | fresh).Names(), Evidence: grown}
	if err := durable.Store(s.file, stored); err != nil {
		return fmt.Errorf("recording the exposure: %w", err)
	}
	s.exposure |= fresh
	s.evidence = grown
	return nil
}

// expose adds legs to the session of a pod. Once private data and untrusted content
// have met, connections that were opened before lose their right and are closed. The
// caller holds the session's mutex.
func (n *Node) expose(p *Pod, takes nucleus.Legs, what string) error {
	const both = nucleus.Private | nucleus.Untrusted
	met := p.root.exposure.Has(both)
	if err := p.root.grow(takes, func(leg string) nucleus.Evidence {
		return nucleus.Evidence{Seq: n.log.Next(), Leg: leg, What: what}
	}); err != nil {
		return err
	}
	if !met && p.root.exposure.Has(both) {
		n.gateway.CloseAll(egress.Peer{Pod: p.record.ID, Session: p.record.Session}, func(a egress.Attempt) bool {
			return a.Via == egress.ViaModel // named by the person at launch
		})
	}
	return nil
}

func (s *rootSession) legs() nucleus.Legs {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exposure
}
