-- One entry of a timeline; body is null when there is no such entry.
--   $1 entry_id  bigint
SELECT body
  FROM (SELECT) AS once
       LEFT JOIN (
       SELECT timeline_json(timeline) AS body
         FROM timeline
        WHERE id = $1) AS entry ON true;
