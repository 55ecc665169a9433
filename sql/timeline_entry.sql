-- read
--
-- One entry of a timeline; body is null when there is no such entry.
--   $1 entry_id  bigint
SELECT (SELECT timeline_json(timeline)
          FROM timeline
         WHERE id = $1) AS body;
