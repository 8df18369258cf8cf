package node

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"

	"cal/internal/durable"
	"cal/nucleus"
)

// rootSession is the exposure and the budget that a session and all its sub-agents and
// sub-pods share. Its mutex is the critical section of a request: decide, add legs, append
// the intent.
type rootSession struct {
	id string // of the session that began it

	mu       sync.Mutex
	pods     map[*Pod]bool // whose machines may be there
	making   int           // pods that were decided and have not joined
	file     string
	exposure nucleus.Legs
	through  nucleus.Legs       // of the exposure: what passages alone have taken
	evidence []nucleus.Evidence // which entry took each leg
	lately   lately             // what it has read and fetched, since this node has it
	passages []passage          // see passage.go
	asks     map[string]openAsk // that wait for a person, those of pods that have ended too
	budget   *ledger            // see budget.go
	freed    chan struct{}      // closed, and made anew, when a call to the model ends
}

type exposureFile struct {
	Legs     []string           `json:"legs"`
	Through  []string           `json:"through,omitempty"`
	Evidence []nucleus.Evidence `json:"evidence,omitempty"`
}

// budgetFile is what a root session has spent, in the directory of its first pod.
const budgetFile = "budget.json"

// openSession reads the exposure that is stored with a workspace: a new session
// starts with it. id is the session's; what it has spent lies in podDir.
// exposureName is the file of a workspace that says what its sessions have taken.
const exposureName = "exposure.json"

func openSession(id, workspaceDir, podDir string) (*rootSession, error) {
	s := &rootSession{id: id, pods: map[*Pod]bool{}, file: filepath.Join(workspaceDir, exposureName)}
	var err error
	if s.budget, err = openLedger(filepath.Join(podDir, budgetFile)); err != nil {
		return nil, err
	}
	var stored exposureFile
	err = durable.Load(s.file, &stored)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if s.exposure, err = nucleus.LegsOf(stored.Legs); err != nil {
		return nil, fmt.Errorf("%s: %w", s.file, err)
	}
	if s.through, err = nucleus.LegsOf(stored.Through); err != nil {
		return nil, fmt.Errorf("%s: %w", s.file, err)
	}
	s.evidence = stored.Evidence
	return s, nil
}

// beside is what the session has taken by anything but passages.
func (s *rootSession) beside() nucleus.Legs { return s.exposure &^ s.through }

// grow adds legs durably, through a passage or not. The caller holds the mutex and has
// not acted yet.
func (s *rootSession) grow(takes nucleus.Legs, passage bool, evidence func(leg string) nucleus.Evidence) error {
	known := s.beside()
	if passage {
		known = s.exposure
	}
	fresh := takes &^ known
	if fresh == 0 {
		return nil
	}
	through := s.through &^ fresh
	if passage {
		through = s.through | fresh
	}
	grown := append([]nucleus.Evidence(nil), s.evidence...)
	for _, leg := range fresh.Names() {
		grown = append(grown, evidence(leg))
	}
	stored := exposureFile{Legs: (s.exposure | fresh).Names(), Through: through.Names(), Evidence: grown}
	if err := durable.Store(s.file, stored); err != nil {
		return fmt.Errorf("recording the exposure: %w", err)
	}
	s.exposure |= fresh
	s.through = through
	s.evidence = grown
	return nil
}

// bothLegs are what must not meet without a person.
const bothLegs = nucleus.Private | nucleus.Untrusted

// expose adds legs to the session of a pod. Once private data and untrusted content
// have met, and when passages end by it, connections that were let in before lose their
// right and are closed, those of the other pods of the session too. The caller holds the
// session's mutex.
func (n *Node) expose(p *Pod, takes nucleus.Legs, passage bool, what string) error {
	met, beside := p.root.exposure.Has(bothLegs), p.root.beside()
	if err := p.root.grow(takes, passage, func(leg string) nucleus.Evidence {
		return nucleus.Evidence{Seq: n.log.Next(), Leg: leg, What: what}
	}); err != nil {
		return err
	}
	if !met && p.root.exposure.Has(bothLegs) || p.root.beside() != beside {
		n.closeUncovered(p.root)
	}
	return nil
}

func (s *rootSession) legs() nucleus.Legs {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exposure
}
